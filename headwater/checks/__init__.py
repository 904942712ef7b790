"""What `headwater doctor` looks at: this machine, a broker, a store. A check gives findings and never raises."""
