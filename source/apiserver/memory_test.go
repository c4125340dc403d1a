package apiserver_test

const followEnv = "FAIRLEAD_TEST_FOLLOW"

func followForMemory() {}
