"""From rows in the lake to a model that devices can run: recipe, dataset, checks, search, evaluate, export, release."""
