"""The parameters of soft prompts: vectors that train, as they are or through an encoder.

Each module's output is [virtual tokens, width]; parameters are named, made and initialized in PEFT's order, so that the
same seed gives the same values.
"""

from __future__ import annotations

import enum

from torch import Tensor, nn

from ..ops.autocast import autocast_off


class Form(enum.Enum):
    """What the rows of a soft prompt are; P virtual tokens, L layers.

    Attributes:
        KEYS_VALUES: [P, L · 2 · heads · dim], each layer's keys and values themselves, keys as after rotation.
        EMBEDDINGS: [P, hidden], put in at the embedding.
        LAYER_INPUTS: [P, L · hidden], put into every layer's input.
    """

    KEYS_VALUES = enum.auto()
    EMBEDDINGS = enum.auto()
    LAYER_INPUTS = enum.auto()


class SoftPrompt(nn.Module):
    """``embedding.weight`` [rows, width], standard normal; that is also the output."""

    encodes = False
    """Whether the output is anything else than the embedding."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width)

    def forward(self) -> Tensor:
        return self.embedding.weight


class PrefixEncoder(SoftPrompt):
    """Prefix Tuning's projection: Linear(dim, hidden) - Tanh - Linear(hidden, out) over [rows, dim]."""

    encodes = True

    def __init__(self, rows: int, dim: int, hidden: int, out: int) -> None:
        super().__init__(rows, dim)
        self.transform = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, out))

    def forward(self) -> Tensor:
        return self.transform(self.embedding.weight)


class MlpEncoder(SoftPrompt):
    """P-Tuning's MLP: three linear layers with ReLU between them over [rows, dim]."""

    encodes = True

    def __init__(self, rows: int, dim: int, hidden: int) -> None:
        super().__init__(rows, dim)
        self.mlp_head = nn.Sequential(
            nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim)
        )

    def forward(self) -> Tensor:
        return self.mlp_head(self.embedding.weight)


class LstmEncoder(SoftPrompt):
    """P-Tuning's bidirectional LSTM along the rows, then Linear(2 hidden, 2 hidden) - ReLU - Linear(2 hidden, dim)."""

    encodes = True

    def __init__(self, rows: int, dim: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__(rows, dim)
        self.lstm_head = nn.LSTM(dim, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True)
        self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, dim))

    def forward(self) -> Tensor:
        rows = self.embedding.weight.unsqueeze(0)
        with autocast_off(rows.device):  # oneDNN has no LSTM in bfloat16 for every CPU
            states = self.lstm_head(rows)[0]
        return self.mlp_head(states).squeeze(0)
