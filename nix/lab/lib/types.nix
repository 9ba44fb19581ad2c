# Option types: what a value may be, and how several definitions of it become one.
lib:
let
  inherit (builtins) all attrNames concatMap head isAttrs isBool isInt isList isString length;

  values = map (d: d.value);
  loose = value: isString value || builtins.isPath value || lib.isDerivation value;

  # Equal definitions agree; different ones are an error.
  one = path: defs:
    let first = (head defs).value; in
    if all (d: d.value == first) defs then first
    else throw "The option `${lib.showOption path}' has conflicting definition values:${lib.showFiles defs}\nUse `lib.mkForce value' or `lib.mkDefault value' to change the priority on any of these definitions.";

  simple = name: check: { inherit name check; merge = one; };

  # Each attribute or element is an option of its own, so mkIf and mkForce work inside.
  nested = type: path: defs: (lib.evalModules {
    modules = [ { options.value = lib.mkOption { inherit type; }; } ]
      ++ map (d: { _file = d.file; config.value = d.value; }) defs;
  }).config.value;
  present = value: !(isAttrs value && value._type or null == "if" && !value.condition);
in
rec {
  bool = simple "boolean" isBool;
  int = simple "signed integer" isInt;
  port = simple "16 bit unsigned integer; between 0 and 65535 (both inclusive)" (x: isInt x && x >= 0 && x < 65536);
  str = simple "string" isString;
  singleLineStr = str;
  strMatching = pattern: simple "string matching the pattern ${pattern}" (x: isString x && builtins.match pattern x != null);
  nonEmptyStr = simple "non-empty string" (x: isString x && x != "");
  lines = { name = "strings concatenated with \"\\n\""; check = isString; merge = _: defs: lib.concatStringsSep "\n" (values defs); };
  path = simple "path" loose;
  package = simple "package" loose;
  raw = simple "raw value" (_: true);
  unspecified = anything;
  enum = allowed: simple "one of ${builtins.toJSON allowed}" (x: builtins.elem x allowed);
  ints.positive = simple "positive integer" (x: isInt x && x > 0);
  ints.unsigned = simple "unsigned integer" (x: isInt x && x >= 0);

  nullOr = type: type // {
    name = "null or ${type.name}";
    check = x: x == null || type.check x;
    merge = path: defs: if all (d: d.value == null) defs then null else type.merge path defs;
  };
  either = a: b: {
    name = "${a.name} or ${b.name}";
    check = x: a.check x || b.check x;
    merge = path: defs: if all (d: a.check d.value) defs then a.merge path defs else b.merge path defs;
  };
  oneOf = types: lib.foldr either (lib.last types) (lib.reverseList (builtins.tail (lib.reverseList types)));

  listOf = type: {
    name = "list of ${type.name}";
    check = isList;
    merge = path: defs: concatMap
      (d: map (value: nested type path [ { inherit (d) file; inherit value; } ])
        (builtins.filter present d.value)) defs;
    emptyValue = [ ];
  };
  nonEmptyListOf = type: removeAttrs (listOf type) [ "emptyValue" ] // { check = x: isList x && x != [ ]; };
  attrsOf = type: {
    name = "attribute set of ${type.name}";
    check = isAttrs;
    merge = path: defs:
      let
        flat = concatMap (d: map (value: d // { inherit value; }) (expand d.value)) defs;
        expand = value: if value._type or null == "merge" then concatMap expand value.contents
          else if value._type or null == "if" then lib.optionals value.condition (expand value.content)
          else [ value ];
        names = lib.unique (concatMap (d: attrNames d.value) flat);
        below = name: builtins.filter (d: d.value ? ${name} && present d.value.${name}) flat;
        child = name: (lib.evalModules {
          modules = [ { options = nest (path ++ [ name ]) (lib.mkOption { inherit type; }); } ]
            ++ map (d: { _file = d.file; config = nest (path ++ [ name ]) d.value.${name}; }) (below name);
        }).config;
        # The value is evaluated under its full path, so that errors in it have that path.
        nest = at: leaf: lib.foldr (name: inner: { ${name} = inner; }) leaf at;
      in
      builtins.listToAttrs (map (name: { inherit name; value = lib.attrByPath (path ++ [ name ]) null (child name); })
        (builtins.filter (name: below name != [ ]) names));
    emptyValue = { };
  };
  lazyAttrsOf = attrsOf;
  attrs = anything;

  # Any value: sets merge, lists concatenate, everything else has to agree.
  anything = {
    name = "anything";
    check = _: true;
    merge = path: defs:
      if all (d: isAttrs d.value && !lib.isDerivation d.value) defs then (attrsOf anything).merge path defs
      else if all (d: isList d.value) defs then concatMap (d: d.value) defs
      else if length defs == 1 || all (d: builtins.isFunction d.value) defs then (lib.last defs).value
      else one path defs;
  };

  submodule = module: {
    name = "submodule";
    check = x: isAttrs x || builtins.isFunction x || builtins.isPath x;
    merge = path: defs: (lib.evalModules {
      prefix = path;
      specialArgs.name = lib.last path;
      modules = lib.flatten [ module ] ++ map (d: if isAttrs d.value then { _file = d.file; config = d.value; } else d.value) defs;
    }).config;
    emptyValue = { };
  };
  submoduleWith = { modules, ... }: submodule modules;

  # Modules as a value (virtualisation.vmVariant): collected, not evaluated here.
  deferredModule = {
    name = "module";
    check = x: isAttrs x || builtins.isFunction x || builtins.isPath x;
    merge = _: defs: { imports = map (d: { _file = d.file; imports = [ d.value ]; }) defs; };
    emptyValue = { };
  };
}
