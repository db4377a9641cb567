"""The handlers, one module for each group of operators; `registry.GROUPS` lists them."""
