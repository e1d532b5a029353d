"""Adapters and EWC state on disk, in files of this library and in those of PEFT."""
