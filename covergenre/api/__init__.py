"""The Python API. Its names are used as `import covergenre as cg; cg.load_model(...)`."""
