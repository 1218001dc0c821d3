#!/usr/bin/env bash
# Builds a wheel with each Python and installs it into empty environments, one a torch version, outside the source tree.
#
#   tests/wheel_check.sh WORK_FOLDER PYTHON...          TORCHES="2.* 2.11.*" to choose (the first one builds)
#                                                       WHEEL=file.whl: that one, for one Python, is not built
#
# Needs the package index, and about 8 GB in WORK_FOLDER for CUDA builds of torch (an environment is removed after its
# check). Prints one line an environment and fails if any of them does.
set -euo pipefail

work=$(mkdir -p "$1" && cd "$1" && pwd)
shift
source_tree=$(cd "$(dirname "$0")/.." && pwd)
read -ra torches <<<"${TORCHES:-2.* 2.11.*}"
failed=0

check() { # the environment's python
  cd "$work" && "$1" - <<'PYTHON'
import copy, io, json, pathlib, subprocess, sys
import torch, pyfastpeft as fp

assert "site-packages" in fp.__file__, fp.__file__
torch.manual_seed(0)
weight, x, dy = torch.randn(96, 160), torch.randn(20, 160), torch.randn(20, 96)
for quant_type in ("nf4", "fp4", "int4"):
    w = fp.quantize_4bit(weight, quant_type)
    a, b = torch.randn(8, 160, requires_grad=True), torch.randn(96, 8, requires_grad=True)
    y = fp.ops.linear_4bit(x, w, None, (a, b, 0.5))
    dense = x.double() @ w.dequantize(torch.float64).t() + 0.5 * x.double() @ a.double().t() @ b.double().t()
    for mine, expected in zip(torch.autograd.grad(y, (a, b), dy), torch.autograd.grad(dense, (a, b), dy.double())):
        assert (mine - expected).norm() <= 1e-5 * expected.norm()
    assert (y - dense).norm() <= 1e-5 * dense.norm()
layer = fp.nn.Linear4bit.from_linear(torch.nn.Linear(160, 96))
state = io.BytesIO()
torch.save(layer.state_dict(), state)
other = copy.deepcopy(layer)
state.seek(0)
other.load_state_dict(torch.load(state, weights_only=True))
assert torch.equal(other(x), layer(x))
from transformers import LlamaConfig, LlamaForCausalLM

model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                     num_attention_heads=2, num_key_value_heads=1))
model = fp.get_peft_model(model, fp.LoraConfig(r=4, task_type="CAUSAL_LM"))
model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
command = pathlib.Path(sys.executable).with_name("pyfastpeft")
json.loads(subprocess.run([command, "info", "--json"], check=True, capture_output=True, text=True).stdout)
print("instruction sets:", *torch.ops.pyfastpeft.available_isas())
PYTHON
}

for python in "$@"; do
  wheel=${WHEEL:+$(realpath "$WHEEL")}
  for torch in "${torches[@]}"; do
    name="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'), torch $torch"
    env="$work/env"
    rm -rf "$env"
    "$python" -m venv "$env"
    "$env/bin/pip" install -q "torch==$torch"
    if [[ -z $wheel ]]; then
      rm -rf "$work/source" "$work/dist"
      mkdir "$work/source"
      git -C "$source_tree" archive HEAD | tar -x -C "$work/source"
      "$env/bin/pip" install -q "setuptools>=77" "pybind11>=2.13"
      SECONDS=0
      "$env/bin/pip" wheel -q --no-deps --no-build-isolation -w "$work/dist" "$work/source"
      wheel=$(ls "$work"/dist/*.whl)
      echo "$name: built $(basename "$wheel") in $SECONDS s"
      "$env/bin/pip" uninstall -q -y pybind11
    fi
    "$env/bin/pip" install -q "$wheel"
    if check "$env/bin/python"; then
      echo "$name: ok ($("$env/bin/python" -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'))"
    else
      echo "$name: FAILED"
      failed=1
    fi
    rm -rf "$env"
  done
done
exit $failed
