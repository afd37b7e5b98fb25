#!/usr/bin/env bash
# test_sdxl.sh /path/to/unet.pth [flags]: the published evaluation of an SDXL UNet, see test.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/test.sh" sdxl "$@"
