"""What the policies of balance and scaling are worth, on made-up and recorded load."""
