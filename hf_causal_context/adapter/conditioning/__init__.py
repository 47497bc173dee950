"""How contexts reach the layers."""
