#!/bin/sh
# Nothing: the guest came up.
