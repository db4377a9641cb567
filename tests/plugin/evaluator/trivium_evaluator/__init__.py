"""A plugin for Trivium: what a package outside of the project needs to add an engine of its own."""
