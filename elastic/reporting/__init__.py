"""Results, plots and the pages that show them."""
