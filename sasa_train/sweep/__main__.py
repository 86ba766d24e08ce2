from sasa_train.sweep import main

main()
