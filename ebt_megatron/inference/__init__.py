"""Uses a trained model: thinking over a cached context, generation, scoring, lm-evaluation-harness."""
