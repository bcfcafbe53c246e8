# What a first import would spend its time on. Runs in the root when the template is built.
set -eu

# matplotlib looks for fonts once and keeps the list here, where every user of a sandbox can read and renew it.
install -d -m 1777 /var/cache/matplotlib
MPLCONFIGDIR=/var/cache/matplotlib python3 -B -c 'import matplotlib.font_manager'
ls /var/cache/matplotlib/fontlist-*.json >/dev/null
chmod -R a+rwX /var/cache/matplotlib
