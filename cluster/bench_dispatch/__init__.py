"""`model1 bench dispatch`: what a layer crossing costs, and what overlap and replicas are worth."""
