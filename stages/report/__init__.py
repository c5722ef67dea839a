"""report.html, the model card and DVC's plots, from what select_best reads."""
