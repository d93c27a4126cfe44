"""How the hot parts run: torch reference, tiled torch, Triton; one dispatch table."""
