"""`model1 bench balance`: a live deployment under an expert load whose hot experts change."""
