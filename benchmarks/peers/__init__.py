"""Other engines that stream without end, to measure beside ours."""
