package lvmthin

// helpers work until they are killed; they return only with an error.
var helpers = map[string]func(args []string) error{}
