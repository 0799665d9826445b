"""What the pack knows of models: families, their text layers, what their attention rows are made of."""
