"""What isn't the method: files and errors, corpora, metrics, tables, prior systems, exports."""
