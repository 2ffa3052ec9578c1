"""From a checkpoint and a recipe to a finished folder: plan, units, job, journal."""
