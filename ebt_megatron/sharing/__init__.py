"""Makes models that others can use: a folder with weights, recipe, tokenizer or encoder and a card; and the Hub."""
