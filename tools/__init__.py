"""Programs for those who work on vaefast; none of them is installed with it."""
