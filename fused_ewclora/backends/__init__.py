"""Implementations of the ops, each with the reasons for which it cannot serve a call."""
