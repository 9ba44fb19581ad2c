# A small module system with the words of nixpkgs' own: `imports`, `options`, `config`, the shorthand
# without them, mkIf, mkMerge, mkOverride, submodules, and errors that name the option and the files.
# It evaluates a host in a tenth of a second where nixpkgs needs ten, which is why the lab has its own.
lib:
let
  inherit (builtins) attrNames concatMap filter foldl' head isAttrs isFunction isList length mapAttrs;

  showOption = lib.concatStringsSep ".";
  isOption = x: isAttrs x && x._type or null == "option";
  isProperty = x: isAttrs x && builtins.elem (x._type or null) [ "if" "merge" "override" "order" ];

  # A definition is { file; value; }. What mkIf and mkMerge wrap is unwrapped; mkOverride and
  # mkOrder become a `priority` and an `order` beside the value. A condition is evaluated only when the value is.
  discharge = { priority ? 100, order ? 1000 }@at: file: value:
    if !isProperty value then [ { inherit file priority order value; } ]
    else if value._type == "merge" then concatMap (discharge at file) value.contents
    else if value._type == "if" then (if value.condition then discharge at file value.content else [ ])
    else if value._type == "order" then discharge (at // { inherit (value) order; }) file value.content
    else discharge (at // { inherit (value) priority; }) file value.content;

  # The same, for a whole subtree: properties are handed down to its children without being forced, so
  # that `config = mkIf config.a.enable { b = …; }` does not need all of config to know the names in it.
  pushDown = value:
    if !isProperty value then [ value ]
    else if value._type == "merge" then concatMap pushDown value.contents
    else map (mapAttrs (_: v: value // { content = v; })) (pushDown value.content);

  showFiles = defs: lib.concatStringsSep "" (map (d: "\n- In `${d.file}': ${showValue d.value}") defs);
  showValue = value:
    if builtins.isString value then builtins.toJSON value
    else if lib.isDerivation value then "<derivation ${value.name}>"
    else if builtins.isBool value || builtins.isInt value || value == null then builtins.toJSON value
    else "<${builtins.typeOf value}>";

  # Only the definitions of the strongest priority count (100 a plain one, 50 mkForce, 1000 mkDefault).
  strongest = defs:
    let best = foldl' (best: d: if d.priority < best then d.priority else best) 9999 defs;
    in filter (d: d.priority == best) defs;

  mergeOption = path: option: defs:
    let
      type = option.type or lib.types.unspecified;
      given = concatMap (d: discharge { } d.file d.value) defs;
      used = strongest (given ++ lib.optional (option ? default)
        { file = "the option's default"; priority = 1500; order = 1000; value = option.default; });
      wrong = filter (d: !type.check d.value) used;
      merged =
        if wrong != [ ] then throw
          "A definition for option `${showOption path}' is not of type `${type.name}'. Definition values:${showFiles wrong}"
        else if used == [ ] then type.emptyValue or (throw
          "The option `${showOption path}' is used but not defined.")
        else type.merge path (builtins.sort (a: b: a.order < b.order) used);
    in
    (option.apply or lib.id) merged;

  # Walks the tree of options; `defs` are the definitions of this subtree.
  evalTree = path: options: defs:
    let
      pushed = concatMap (d: map (value: { inherit (d) file; inherit value; }) (pushDown d.value)) defs;
      below = name: map (d: { inherit (d) file; value = d.value.${name}; })
        (filter (d: d.value ? ${name}) pushed);
      declared = removeAttrs options [ "_freeform" ];
      extra = lib.subtractLists (attrNames declared) (lib.unique (concatMap (d: attrNames d.value) pushed));
      children = mapAttrs
        (name: option:
          if isOption option
          then { value = mergeOption (path ++ [ name ]) option (below name); unknown = [ ]; }
          else evalTree (path ++ [ name ]) option (below name))
        declared;
      free = lib.genAttrs extra (name: mergeOption (path ++ [ name ]) { type = lib.types.anything; } (below name));
    in
    {
      value = mapAttrs (_: child: child.value) children // lib.optionalAttrs (options._freeform or false) free;
      unknown = concatMap (name: children.${name}.unknown) (attrNames children)
        ++ lib.optionals (!options._freeform or false)
          (map (name: { path = path ++ [ name ]; defs = below name; }) extra);
    };

  complain = { path, defs }: throw
    "The option `${showOption path}' does not exist. Definition values:${showFiles defs}";

  mergeDeclarations = path: a: b:
    if isOption a || isOption b then throw "The option `${showOption path}' is declared twice."
    else a // mapAttrs (n: v: if a ? ${n} && n != "_freeform" then mergeDeclarations (path ++ [ n ]) a.${n} v else v) b;
in
rec {
  mkIf = condition: content: { _type = "if"; inherit condition content; };
  mkMerge = contents: { _type = "merge"; inherit contents; };
  mkOverride = priority: content: { _type = "override"; inherit priority content; };
  mkForce = mkOverride 50;
  mkVMOverride = mkOverride 10;
  mkImageMediaOverride = mkOverride 60;
  mkDefault = mkOverride 1000;
  mkOptionDefault = mkOverride 1500;
  mkOrder = order: content: { _type = "order"; inherit order content; };
  mkBefore = mkOrder 500;
  mkAfter = mkOrder 1500;
  mkOption = attrs: { _type = "option"; } // attrs;
  mkEnableOption = what: mkOption { type = lib.types.bool; default = false; description = "Whether to enable ${what}."; };
  mkPackageOption = pkgs: name: _: mkOption { type = lib.types.package; default = pkgs.${name}; };
  inherit showOption showFiles;

  # Returns { config, options, extendModules }. `prefix` is the path of a submodule, for messages.
  evalModules = { modules, specialArgs ? { }, prefix ? [ ] }@args:
    let
      load = parent: module:
        if builtins.isPath module || builtins.isString module || (isAttrs module && module ? outPath)
        then normalise (toString module) (toString module) (import module)
        else normalise null parent module;
      normalise = key: file: module:
        let
          m = if isFunction module then module (lib.mapAttrs (name: _: available.${name} or (throw
              "`${file}' asks for the module argument `${name}', which is not there")) (builtins.functionArgs module)
              // available)
            else module;
          here = m._file or file;
          full = m ? config || m ? options;
        in
        concatMap (load here) (m.imports or [ ]) ++ [{
          inherit key;
          options = m.options or { };
          def = {
            file = here;
            value = if full then m.config or { } else removeAttrs m [ "imports" "_file" "key" "disabledModules" ];
          };
        }];
      available = specialArgs // {
        inherit lib specialArgs;
        # Not checked for unknown options: a module that reads config must not force all of it.
        config = evaluated.value;
        options = declarations;
      };
      # A file that is imported twice counts once.
      loaded = foldl'
        (seen: m: if m.key != null && builtins.any (s: s.key == m.key) seen then seen else seen ++ [ m ]) [ ]
        (concatMap (load "<unknown-file>") modules);
      declarations = foldl' (mergeDeclarations prefix) { } (map (m: m.options) loaded);
      evaluated = evalTree prefix declarations (map (m: m.def) loaded);
    in
    {
      config = if evaluated.unknown == [ ] then evaluated.value else complain (head evaluated.unknown);
      options = declarations;
      extendModules = { modules ? [ ], specialArgs ? { }, prefix ? [ ] }@more:
        evalModules (args // {
          modules = args.modules ++ more.modules or [ ];
          specialArgs = args.specialArgs or { } // more.specialArgs or { };
        });
    };
}
