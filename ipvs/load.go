package ipvs

import "errors"

func load(string) error { return errors.New("cannot load") }
