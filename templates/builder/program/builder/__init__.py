"""What fills the root disk of a tenant's template."""
