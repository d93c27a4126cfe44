"""EBT-Megatron: pretraining of Energy-Based Transformers at scale."""
