"""Options of launches."""

FUSED = {"enable_fp_fusion": True}
"""Products and sums may be contracted. Triton 3.9 warns where this is left to its default, which 3.10 turns round."""
