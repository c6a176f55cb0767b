"""Cost of an experiment under a sharding layout, estimated ahead of time by compilation."""
