"""All that knows of ranks: the group, the sharded layers, the collectives, the stages."""
