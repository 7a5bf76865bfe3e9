"""What the verbs leave behind, one module for each kind of artifact."""
