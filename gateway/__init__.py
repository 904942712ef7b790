"""The road between broker and lake: ingress, admission, committer, acknowledger."""
