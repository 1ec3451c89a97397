"""Floor 4: many VMs on one host: capacity, the record of what runs."""
