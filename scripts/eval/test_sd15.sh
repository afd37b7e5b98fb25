#!/usr/bin/env bash
# test_sd15.sh /path/to/unet.pth [flags]: the published evaluation of an SD1.5 UNet, see test.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/test.sh" sd15 "$@"
