"""What runs where, and why: the environment, the layers of a model, dry runs on named models."""
