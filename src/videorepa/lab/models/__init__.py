"""Trains and assembles the lab's micro models."""
