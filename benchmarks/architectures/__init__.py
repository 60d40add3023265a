"""Every model type of Transformers, tried with a tiny random model: what works, and what is refused."""
