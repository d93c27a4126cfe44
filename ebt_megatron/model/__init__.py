"""What the network is: layers, the energy model, the Transformer++ and DiT baselines."""
