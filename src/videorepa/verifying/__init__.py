"""Compares a recipe's weights, as they are used here, with stock classes and with references."""
