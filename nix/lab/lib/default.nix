# The part of nixpkgs' `lib` that host files of the lab use, under nixpkgs' names.
let
  colour = number: builtins.fromJSON ''"\u001b[${number}m"'';
  lib = builtins // rec {
    trivial.release = "24.11";
    id = x: x;
    literalExpression = text: text;
    const = x: _: x;
    flip = f: a: b: f b a;
    optional = condition: value: if condition then [ value ] else [ ];
    optionals = condition: values: if condition then values else [ ];
    optionalString = condition: text: if condition then text else "";
    optionalAttrs = condition: attrs: if condition then attrs else { };
    concatMapStrings = f: list: concatStrings (map f list);
    concatMapStringsSep = separator: f: list: concatStringsSep separator (map f list);
    concatStrings = builtins.concatStringsSep "";
    concatStringsSep = builtins.concatStringsSep;
    concatLines = concatMapStrings (line: line + "\n");
    concatMap = builtins.concatMap;
    flatten = x: if builtins.isList x then builtins.concatMap flatten x else [ x ];
    last = list: builtins.elemAt list (builtins.length list - 1);
    foldl' = builtins.foldl';
    foldr = f: start: list: builtins.foldl' (acc: x: f x acc) start (reverseList list);
    reverseList = list: let n = builtins.length list; in builtins.genList (i: builtins.elemAt list (n - 1 - i)) n;
    imap0 = f: list: builtins.genList (i: f i (builtins.elemAt list i)) (builtins.length list);
    range = first: final: builtins.genList (i: first + i) (final - first + 1);
    unique = builtins.foldl' (acc: x: if builtins.elem x acc then acc else acc ++ [ x ]) [ ];
    subtractLists = gone: builtins.filter (x: !builtins.elem x gone);
    any = builtins.any;
    all = builtins.all;
    nameValuePair = name: value: { inherit name value; };
    genAttrs = names: f: builtins.listToAttrs (map (n: nameValuePair n (f n)) names);
    mapAttrs' = f: set: builtins.listToAttrs (map (n: f n set.${n}) (builtins.attrNames set));
    mapAttrsToList = f: set: map (n: f n set.${n}) (builtins.attrNames set);
    concatMapAttrs = f: set: builtins.foldl' (acc: n: acc // f n set.${n}) { } (builtins.attrNames set);
    filterAttrs = keep: set:
      builtins.listToAttrs (map (n: nameValuePair n set.${n})
        (builtins.filter (n: keep n set.${n}) (builtins.attrNames set)));
    attrByPath = path: default: set:
      if path == [ ] then set
      else if builtins.isAttrs set && set ? ${builtins.head path}
      then attrByPath (builtins.tail path) default set.${builtins.head path}
      else default;
    recursiveUpdate = a: b:
      a // builtins.mapAttrs
        (n: v: if builtins.isAttrs v && builtins.isAttrs (a.${n} or null) then recursiveUpdate a.${n} v else v) b;
    hasPrefix = prefix: text: builtins.substring 0 (builtins.stringLength prefix) text == prefix;
    hasSuffix = suffix: text:
      let n = builtins.stringLength text; k = builtins.stringLength suffix;
      in n >= k && builtins.substring (n - k) k text == suffix;
    removeSuffix = suffix: text:
      if hasSuffix suffix text
      then builtins.substring 0 (builtins.stringLength text - builtins.stringLength suffix) text
      else text;
    splitString = separator: text:
      builtins.filter builtins.isString (builtins.split (escapeRegex separator) text);
    escapeRegex = text: builtins.replaceStrings
      [ "\\" "." "*" "+" "?" "(" ")" "[" "]" "{" "}" "|" "^" "$" ]
      [ "\\\\" "\\." "\\*" "\\+" "\\?" "\\(" "\\)" "\\[" "\\]" "\\{" "\\}" "\\|" "\\^" "\\$" ] text;
    escapeShellArg = text: "'" + builtins.replaceStrings [ "'" ] [ "'\\''" ] (toString text) + "'";
    escapeShellArgs = concatMapStringsSep " " escapeShellArg;
    fileContents = path: removeSuffix "\n" (builtins.readFile path);
    isDerivation = x: builtins.isAttrs x && x.type or null == "derivation";
    getBin = package: package;
    getExe = package: "${package}/bin/${package.meta.mainProgram or package.pname or package.name}";
    getExe' = package: name: "${package}/bin/${name}";
    makeBinPath = concatMapStringsSep ":" (package: "${package}/bin");
    warn = builtins.warn or (message: value: builtins.trace "${colour "1;35"}evaluation warning:${colour "0"} ${message}" value);
  }
  // import ./modules.nix lib
  // { types = import ./types.nix lib; };
in
lib
