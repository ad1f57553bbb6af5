"""What `ldbfr doctor` looks at, on a machine, in a bucket, at an endpoint, and on a cluster's nodes. Without Ray."""
