# encode's flow with fake handlers, host
