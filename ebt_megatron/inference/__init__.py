"""Using a trained model: thinking over a cached context, and what generates and scores text with it."""
