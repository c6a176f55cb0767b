"""What a layout costs, known before a machine is rented."""
