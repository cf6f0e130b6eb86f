"""`model1 chaos`: faults at random under load, and whether anybody noticed."""
