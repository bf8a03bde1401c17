"""One resumable run: its directory (`store`), machine, page, figures and statistics."""
