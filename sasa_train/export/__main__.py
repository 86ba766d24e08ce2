from sasa_train.export import main

main()
