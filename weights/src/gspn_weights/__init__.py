"""Trained models of gspn, a folder for each. gspn.weights finds them; there is no code here."""
