#!/bin/sh
# Xcode: target > Build Phases > New Run Script Phase, before "Copy Bundle Resources":
#
#     "$SRCROOT/copy_model.sh"
#
# Build settings (User-Defined):
#     MODEL_RELEASE  folder that `phoneready release` made, or a copy of it
#     MODEL_QUANT    Q4_0, Q8_0, ... or an ONNX variant such as int4
#
# Puts the chosen model into the app's resources under Models/, if every byte is what the manifest says; the build fails
# otherwise, with an error that Xcode shows. A file that is there already and right is not copied again.
# Uncheck "Based on dependency analysis", or list manifest.json as input file.
set -eu

fail() {
    echo "error: $*" >&2
    exit 1
}

release=${MODEL_RELEASE:-}
quant=${MODEL_QUANT:-Q4_0}
[ -n "$release" ] || fail "set MODEL_RELEASE in the build settings"
[ -f "$release/manifest.json" ] || fail "$release has no manifest.json"
resources="${TARGET_BUILD_DIR:?run by Xcode}/${UNLOCALIZED_RESOURCES_FOLDER_PATH:?run by Xcode}/Models"

sha256() {
    if command -v shasum >/dev/null; then shasum -a 256 "$1"; else sha256sum "$1"; fi | cut -d ' ' -f 1
}

# One line a file of the chosen model: hash, tab, path. (Xcode brings python3.)
files=$(python3 - "$release/manifest.json" "$quant" <<'PYTHON'
import json, sys
manifest = json.load(open(sys.argv[1], encoding="utf-8"))
if manifest["schema_version"] != 5:
    sys.exit("a manifest of another version")
shipped = [f for f in manifest["files"] if f["role"] == "shipped"]
chosen = [f["file"] for f in shipped if f["quant"] == sys.argv[2]]
if not chosen:
    sys.exit(f"no {sys.argv[2]} in the release; there are " + ", ".join(f["quant"] for f in shipped))
for content in manifest["contents"]:
    path = content["path"]
    if path == chosen[0] or path.startswith(chosen[0] + "/"):
        if ".." in path.split("/") or "\n" in path or "\t" in path:
            sys.exit("a path that leads out of the release")
        print(content["sha256"], path, sep="\t")
PYTHON
) || fail "cannot choose a model from $release/manifest.json"

mkdir -p "$resources"
printf '%s\n' "$files" | while IFS="$(printf '\t')" read -r wanted path; do
    source="$release/$path"
    target="$resources/$path"
    [ -f "$source" ] || fail "$source is missing"
    if [ -f "$target" ] && [ "$(sha256 "$target")" = "$wanted" ]; then
        continue
    fi
    mkdir -p "$(dirname "$target")"
    cp "$source" "$target.part"
    [ "$(sha256 "$target.part")" = "$wanted" ] || { rm -f "$target.part"; fail "$source is not the released file"; }
    mv "$target.part" "$target"
    echo "placed $path"
done
